"""Tensor maps (``CUtensorMap``): 128 bytes by which a kernel copies tiles, encoded by the driver."""

from __future__ import annotations

import ctypes
from ctypes import c_uint, c_uint64
from typing import Any, Final

from tilewright.codegen.recipe.resolve import ResolvedMap
from tilewright.runtime.launchers.cuda.driver import CudaDevice, Driver

MAP_BYTES: Final = 128
_ALIGNMENT: Final = 64
_NOT_INTERLEAVED, _ZEROS_OUTSIDE = 0, 0
_SMALL_BYTES: Final = 128 << 10
_MENDED_SM, _MENDED_DRIVER = 100, 13040
_FAULTY_BIT: Final = ~(1 << 21)


class EncodedMap:
    """A tensor map in memory that stays where it is."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = -(-start // _ALIGNMENT) * _ALIGNMENT

    @property
    def words(self) -> Any:
        """Its content, uint64 [16]; writable."""
        return (c_uint64 * (MAP_BYTES // 8)).from_address(self.address)


def mends_small_maps(driver: Driver, device: CudaDevice) -> bool:
    """Whether maps of tensors under 128 KiB are mended there.

    Drivers before 13.4 make such maps for Blackwell that fault; as NVIDIA's release notes of 595.71.05 say, and CUTLASS
    and Triton do, bit 21 of the second word is cleared there.
    """
    return device.sm >= _MENDED_SM and driver.version < _MENDED_DRIVER


def encode(driver: Driver, device: CudaDevice, wanted: ResolvedMap, address: int) -> EncodedMap:
    """The map of the tensor that begins at ``address`` on ``device``, whose context has to be current.

    Raises:
        DriverError: when the driver refuses what is to be mapped.

    """
    encoding, rank = wanted.encoding, len(wanted.shape)
    nbytes = [stride * encoding.element_bytes for stride in wanted.strides]
    made = EncodedMap()
    driver.call(
        "cuTensorMapEncodeTiled",
        made.address,
        encoding.data_type,
        rank,
        address,
        (c_uint64 * rank)(*reversed(wanted.shape)),
        (c_uint64 * rank)(*reversed(nbytes[:-1])),
        (c_uint * rank)(*reversed(encoding.box)),
        (c_uint * rank)(*[1] * rank),
        _NOT_INTERLEAVED,
        encoding.swizzle,
        encoding.l2_promotion,
        _ZEROS_OUTSIDE,
    )
    if mends_small_maps(driver, device) and wanted.shape[0] * nbytes[0] < _SMALL_BYTES:
        made.words[1] &= _FAULTY_BIT
    return made
