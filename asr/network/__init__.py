"""The model as torch and as ONNX: its modules, its checkpoint file, its export.

Imports the runtime and the ground floor.
"""
