"""The quantizer both public classes are: argument checks around a backend."""

import math
import threading

import torch
from torch import Tensor

from rectokens._turboquant.backends import Backend, make_backend
from rectokens._turboquant.codec import Rotation, is_plain_int, packed_dim
from rectokens._turboquant.lloyd_max import codebook
from rectokens._turboquant.signs import MAX_SEED

QUANTIZER_BITS = (1, 2, 4, 8)


def check_bits(bits: object) -> None:
    """Raise ValueError unless `bits` is one the quantizers take."""
    if not is_plain_int(bits) or bits not in QUANTIZER_BITS:
        raise ValueError(f"bits must be one of {QUANTIZER_BITS}, got {bits!r}")


def check_seed(seed: object) -> None:
    """Raise ValueError unless `seed` is an int in [0, 2**64)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be an int in [0, 2**64), got {seed!r}")


class VectorQuantizer:
    """Normalise, rotate, assign to Lloyd-Max centroids, pack; and back."""

    def __init__(
        self, dim: int, bits: int, rotation: Rotation | None, codec: str, least_squares: bool
    ) -> None:
        self.dim = dim
        self.bits = bits
        self.codec = codec
        self.least_squares = least_squares
        self._rotation = rotation
        self._backends: dict[torch.device, Backend] = {}
        self._lock = threading.Lock()
        codebook(dim, bits)  # Solved now, so that the first request does not wait for it.

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, bits={self.bits}, codec={self.codec!r})"

    def _backend(self, device: torch.device) -> Backend:
        with self._lock:
            backend = self._backends.get(device)
            if backend is None:
                backend = make_backend(self.dim, self.bits, self._rotation, device)
                self._backends[device] = backend
            return backend

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compress vectors.

        Args:
            x: floating point, `(..., dim)`, on any device.

        Returns:
            `packed`, uint8 `(..., packed_dim(dim, bits))`, element 0 in the low bits of byte 0;
            and `norms`, float32 `(...)`. A zero vector has norm 0.

        Raises:
            ValueError: `x` is not floating point, its last dimension is not `dim`, it holds NaN or
                infinity, or the norm of a vector does not fit float32. Looking at that is the one
                point where a GPU is waited for.
        """
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}), got {tuple(x.shape)}")
        rows = x.reshape(-1, self.dim)
        width = packed_dim(self.dim, self.bits)
        packed = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=x.device)
        norms = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        if rows.shape[0]:
            self._backend(x.device).encode(rows, packed, norms)
            finite = torch.isfinite(norms)
            if not bool(finite.all()):
                self._refuse(rows, finite)
            if self.least_squares:
                norms = self._least_squares_scale(rows, packed)
        return packed.reshape(*x.shape[:-1], width), norms.reshape(x.shape[:-1])

    @staticmethod
    def _refuse(rows: Tensor, finite: Tensor) -> None:
        row = int((~finite).nonzero()[0, 0])
        if not bool(torch.isfinite(rows[row]).all()):
            raise ValueError(f"x must be finite, vector {row} holds NaN or infinity")
        raise ValueError(f"the norm of vector {row} of x is beyond the range of float32")

    def _least_squares_scale(self, rows: Tensor, packed: Tensor) -> Tensor:
        """The scale that minimises the error of each decoded vector, `(n,)` float32.

        With q the centroids and y the rotated row it is `<y, q> / <q, q>`; the rotation keeps inner
        products, so the decoded unit vector serves as q.
        """
        ones = torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)
        unit = self.decode(packed, ones)
        return (rows.float() * unit).sum(1) / (unit * unit).sum(1)

    @torch.no_grad()
    def decode(self, packed: Tensor, norms: Tensor) -> Tensor:
        """Restore vectors.

        Args:
            packed: uint8 `(..., packed_dim(dim, bits))`, as `encode` gave it.
            norms: float32 `(...)`.

        Returns:
            float32 `(..., dim)`, on the device of `packed`.

        Raises:
            ValueError: a dtype or a shape that does not fit, or tensors on different devices.
        """
        width = packed_dim(self.dim, self.bits)
        if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != width:
            raise ValueError(
                f"packed must be uint8 of shape (..., {width}), got {packed.dtype} "
                f"{tuple(packed.shape)}"
            )
        if norms.dtype != torch.float32 or norms.shape != packed.shape[:-1]:
            raise ValueError(
                f"norms must be float32 of shape {tuple(packed.shape[:-1])}, got {norms.dtype} "
                f"{tuple(norms.shape)}"
            )
        if norms.device != packed.device:
            raise ValueError(f"packed is on {packed.device}, norms on {norms.device}")
        rows = packed.reshape(-1, width)
        x_hat = torch.empty(rows.shape[0], self.dim, dtype=torch.float32, device=packed.device)
        if rows.shape[0]:
            self._backend(packed.device).decode(rows, norms.reshape(-1), x_hat)
        return x_hat.reshape(*packed.shape[:-1], self.dim)

    def mse(self, x: Tensor) -> float:
        """Mean over the vectors of `x` `(..., dim)` of the squared L2 error of a round trip.

        Raises:
            ValueError: as `encode`, or no vectors.
        """
        if x.numel() == 0:
            raise ValueError(f"x must hold at least one vector, got shape {tuple(x.shape)}")
        error = self.decode(*self.encode(x)).double() - x.double()
        return float(error.square().sum(-1).mean())

    def lower_bound(self) -> float:
        """Error no quantizer of that many bits can beat on unit vectors: `4**-bits` (Theorem 3)."""
        return float(4.0**-self.bits)

    def upper_bound(self) -> float:
        """`sqrt(3 * pi) / 2 * 4**-bits`, about 1.54 times the lower bound.

        The measured error of unit vectors exceeds this value at 2 bits and more: the paper's
        constant is `sqrt(3) * pi / 2`, which `paper_upper_bound` gives.
        """
        return math.sqrt(3.0 * math.pi) / 2.0 * self.lower_bound()

    def paper_upper_bound(self) -> float:
        """The paper's bound on unit vectors, `sqrt(3) * pi / 2 * 4**-bits` (Theorem 1)."""
        return math.sqrt(3.0) * math.pi / 2.0 * self.lower_bound()
