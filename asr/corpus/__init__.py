"""Lists of utterances and texts: manifests, preparing and downloading them, counting their words.

Imports the runtime and the ground floor.
"""
