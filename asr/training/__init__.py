"""How a model learns: the command train.py, the trainer, its data, augmentation, loss, optimiser.

Imports network, corpus, runtime and the ground floor.
"""
