"""A torch view of raw memory that torch neither owns nor asks the driver about."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KDL_CPU, KDL_CUDA = 1, 2
_KDL_UINT = 1


class _DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (
    ("dl_tensor", _DLTensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", _Deleter),
)

# By address: keeps the C structs alive until torch has dropped its last view.
_alive: dict[int, tuple[_DLManagedTensor, Any]] = {}


@_Deleter
def _forget(managed: Any) -> None:  # noqa: ANN401
    _alive.pop(ctypes.addressof(managed.contents), None)


def u8_view(address: int, nbytes: int, device_id: int, device_type: int = KDL_CUDA) -> torch.Tensor:
    """View bytes as a uint8 tensor ``[nbytes]`` (DLPack 0, the unversioned struct).

    DLPack names the device, so torch does not query the pointer and the range may be partly
    unmapped; ``__cuda_array_interface__`` refuses such a range.

    Parameters
    ----------
    address, nbytes : int
        The range; it must outlive every view.
    device_id, device_type : int
        As in DLPack: 1 is the CPU, 2 CUDA.
    """
    import torch

    managed = _DLManagedTensor()
    shape = (ctypes.c_int64 * 1)(nbytes)
    tensor = managed.dl_tensor
    tensor.data = address
    tensor.device = _DLDevice(device_type, device_id)
    tensor.ndim = 1
    tensor.dtype = _DLDataType(_KDL_UINT, 8, 1)
    tensor.shape = shape
    managed.deleter = _forget
    _alive[ctypes.addressof(managed)] = (managed, shape)
    capsule_new = ctypes.pythonapi.PyCapsule_New
    capsule_new.restype = ctypes.py_object
    capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    view: torch.Tensor = torch.from_dlpack(
        capsule_new(ctypes.addressof(managed), b"dltensor", None)
    )
    return view
