"""By what factors an estimate may be off: the bounds of a plan."""

from math import exp, hypot, log
from typing import NamedTuple, Self


class Spread(NamedTuple):
    """Factors by which a number may be less or more, at least 1 each.

    Example:
        >>> Spread(2, 3).at(-1), Spread(2, 3).at(1)
        (0.5, 3)
    """

    less: float = 1.0
    more: float = 1.0

    @classmethod
    def both(cls, factor: float) -> Self:
        """Up or down by one factor."""
        return cls(factor, factor)

    def at(self, bound: int) -> float:
        """The factor at the lower (-1) or upper (1) bound."""
        return self.more if bound > 0 else 1 / self.less

    def beside(self, other: "Spread") -> "Spread":
        """The spread of a product of two independent numbers: their logarithms add in squares.

        Example:
            >>> [round(factor, 2) for factor in Spread(3, 3).beside(Spread(1, 2))]
            [3.0, 3.67]
        """
        return Spread(*(exp(hypot(log(a), log(b))) for a, b in zip(self, other, strict=True)))


SURE = Spread()
