"""What Megatron's Mamba layers call of mamba-ssm, which needs a GPU, in plain torch."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere


def mamba_split_conv1d_scan_combined(
    zxbcdt: Any,  # a tensor; its split and unflatten have no types
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,  # noqa: N803
    D: torch.Tensor,  # noqa: N803
    *,
    headdim: int,
    ngroups: int,
    **_: object,
) -> torch.Tensor:
    """Mamba-2's short convolution, selective scan and gate, one token after the other.

    Args:
        zxbcdt: gate z, input x, B, C and step dt: (batch, length, width).
        conv1d_weight: (channels of x, B and C, kernel).
        conv1d_bias: (channels,).
        dt_bias: (heads,), as ``A`` and ``D``.
        headdim: size of a head.
        ngroups: heads of one group share B and C.
    """
    heads = len(A)
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, zxbcdt.shape[-1] - inner - heads, heads], dim=-1)
    padded = F.pad(xbc.transpose(1, 2), (conv1d_weight.shape[1] - 1, 0))
    convolved = F.conv1d(padded, conv1d_weight.unsqueeze(1), conv1d_bias, groups=xbc.shape[-1])
    mixed: Any = F.silu(convolved).transpose(1, 2).float()
    x, bc = mixed[..., :inner], mixed[..., inner:]
    x = x.unflatten(-1, (heads, headdim))
    b, c = bc.unflatten(-1, (2, ngroups, -1)).repeat_interleave(heads // ngroups, 3).unbind(2)
    dt = F.softplus(dt.float() + dt_bias)
    state = x.new_zeros(len(x), heads, headdim, b.shape[-1])
    outputs = []
    for token in range(x.shape[1]):
        step = dt[:, token, :, None, None]
        added = x[:, token, :, :, None] * b[:, token, :, None]
        state = state * torch.exp(step * A[:, None, None]) + step * added
        outputs.append((state * c[:, token, :, None]).sum(-1) + D[:, None] * x[:, token])
    return (torch.stack(outputs, 1).flatten(2) * F.silu(z.float())).to(z.dtype)


class GatedNorm(torch.nn.Module):
    """The RMS norm of mamba-ssm, by groups; Megatron's mixer gates before."""

    def __init__(self, hidden_size: int, eps: float, group_size: int, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", None)
        self._eps, self._group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize each group."""
        groups = x.float().view(*x.shape[:-1], -1, self._group_size)
        return (
            F.rms_norm(groups, (self._group_size,), eps=self._eps).flatten(-2).to(x) * self.weight
        )


def install() -> None:
    """Stand for the package, for the rest of the process."""

    def not_called(*_: object) -> None:
        raise NotImplementedError

    layernorm = types.ModuleType("mamba_ssm.ops.triton.layernorm_gated")
    layernorm.RMSNorm = GatedNorm  # type: ignore[attr-defined]
    combined = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    combined.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined  # type: ignore[attr-defined]
    combined.mamba_chunk_scan_combined = not_called  # type: ignore[attr-defined]
    packages = [types.ModuleType(f"mamba_ssm{name}") for name in ("", ".ops", ".ops.triton")]
    sys.modules |= {module.__name__: module for module in (*packages, layernorm, combined)}
