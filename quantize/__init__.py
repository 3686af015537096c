"""Integers and scales from trained weights, one source of truth per package.

scheme.py     in which format                           tensors.py   codes, scales, zeros
reader.py     reads whole texts with any model          parallel.py  independent work on all cores
hessians.py   what a looped weight sees in every loop   gptq.py      codes that keep the outputs
quantizer.py  the stages, in the order of the data      qat.py, gate.py   finetune, exit gate
kv_scales.py  an int8 cache                             compare.py   what it cost
store.py      quantised checkpoints on disk             streamed.py  rounded tensor by tensor
"""

from .quantizer import Quantized, QuantizeRequest, quantize
from .scheme import Scheme
from .store import is_quantized_checkpoint, load_quantized, save_quantized
from .streamed import can_stream, quantize_folder
from .tensors import Format, QuantizedTensor

__all__ = [
    "Format",
    "QuantizeRequest",
    "Quantized",
    "QuantizedTensor",
    "Scheme",
    "can_stream",
    "is_quantized_checkpoint",
    "load_quantized",
    "quantize",
    "quantize_folder",
    "save_quantized",
]
