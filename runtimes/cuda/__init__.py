"""What the CUDA engine (runtimes/engines/cuda.py) is made of; all of it also runs on a CPU, where it is tested.

recorded.py   work on tensors that keep their place, as a CUDA graph     drive.py     the loop, launched ahead of its flags
dry.py        every recording, built from shapes alone                   reads.py     what operators read from memory
batch.py      many texts at once, those that have stopped leave          traffic.py   what calls read, for a roofline
"""
