"""What the CUDA engine (runtimes/engines/cuda.py) is made of; all of it also runs on a CPU, where it is tested.

recorded.py   work on tensors that keep their place, as a CUDA graph     drive.py   the loop, launched ahead of its flags
"""
