"""All that turns audio into text on a device, and the manners of a command.

Imports NumPy, onnxruntime, soundfile and soxr; never torch (but for a `.pt`) and no other room.
"""
