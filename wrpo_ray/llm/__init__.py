"""Chats into tokens, checks of model folders, engine settings, and the client of endpoints."""
