"""How good, how large and how fast a model is, and the tables and plots that say so.

Imports every other room.
"""
