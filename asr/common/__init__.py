"""The ground floor: error rates of texts, and where a result comes from.

Imports nothing of this project; every room but the runtime may use it.
"""
