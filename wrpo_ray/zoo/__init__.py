"""The tiny heterogeneous models of the demo, trained from nothing, and a small real model.

skills.py      questions with exact answers, and the verifier (pure)
mistakes.py    wrong answers of the kinds that models give (pure)
tokenizers.py  four tokenizers of different kinds, each with its chat template
models.py      four architectures of about 0.3M parameters
training.py    plain PyTorch loops
recipes.py     how each model of the zoo is trained, measured and saved
build.py       the whole zoo, in parallel and resumable (imports no torch)
smollm2.py     a real model, out of a package that pip fetches
"""
