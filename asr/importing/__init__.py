"""Other people's models: NeMo archives and ONNX exports as checkpoints of this project.

Imports the network, the corpus, the runtime and the ground floor.
"""
