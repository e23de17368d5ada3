"""Writes a GGUF model again with other tensor types, for llama.cpp as a peer: BF16, and Q4_0 by llama.cpp's own quantizer."""

import ctypes
import os

import gguf
import numpy as np


def write_bf16(source: str, target: str) -> None:
    """Every matrix of `source` as BF16 (dequantized by the gguf package), everything else as it is."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target + ".part", architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(list(reversed([int(n) for n in tensor.shape])))
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(target + ".part", target)


def write_q4_0(source: str, target: str) -> None:
    """Q4_0 of a BF16 file, as llama.cpp's `llama-quantize FILE q4_0` makes it."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.nthread = 2
    part = (target + ".part").encode()
    if llama_cpp.llama_model_quantize(source.encode(), part, ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source}")
    os.replace(target + ".part", target)
