"""FlashAttention 3 for diffusers from the package ``fa3-fwd``, so that both engines have the same kernels."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types


def provide_flash_attention_3() -> None:
    """Let diffusers' backend ``_flash_3`` find ``fa3-fwd``, whose module has another name. Call it before diffusers."""
    assert "diffusers.models.attention_dispatch" not in sys.modules, "diffusers has looked for its packages already"
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return
    import diffusers.utils.import_utils as packages
    import fa3_fwd_interface

    def flash_attn_func(**arguments: object) -> object:
        # Of the arguments that diffusers names, the package lacks some; all have their default there.
        names = ("q", "k", "v", "softmax_scale", "causal")
        return fa3_fwd_interface.flash_attn_func(**{name: arguments[name] for name in names}, return_attn_probs=True)

    module = types.ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = fa3_fwd_interface.flash_attn_varlen_func  # type: ignore[attr-defined]
    sys.modules["flash_attn_interface"] = module
    packages._flash_attn_3_available = True
