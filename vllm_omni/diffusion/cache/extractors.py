"""Tables of the transformers that a step cache can take apart, by the class name that ``model_index.json`` gives.

A model in this tree adds a line. Another package calls :func:`register_extractor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.diffusion.staged_forward import StagedForward

# (transformer, *arguments of its forward) -> that forward, taken apart
Extractor = Callable[..., StagedForward]


def stages(transformer: Any, *args: Any, **kwargs: Any) -> StagedForward:
    """The extractor of a transformer that describes its own forward by a method ``stages``."""
    taken_apart: StagedForward = transformer.stages(*args, **kwargs)
    return taken_apart


EXTRACTOR_REGISTRY: dict[str, Extractor] = {
    "QwenImageTransformer2DModel": stages,
    "FluxTransformer2DModel": stages,
    "WanTransformer3DModel": stages,
}


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """Coefficients of TeaCache, the highest degree first, and for which transformers they were fitted.

    ``matching`` are entries of the transformer's ``config.json``. ``num_transformers`` is how many the pipeline has.
    """

    coefficients: tuple[float, ...]
    matching: Mapping[str, Any] = field(default_factory=dict)
    num_transformers: int = 1

    def fits(self, config: Mapping[str, Any], num_transformers: int) -> bool:
        return self.num_transformers == num_transformers and all(
            config.get(name) == value for name, value in self.matching.items()
        )


# The first that fits is taken.
POLYNOMIALS: dict[str, tuple[Polynomial, ...]] = {
    # https://github.com/ali-vilab/TeaCache, TeaCache4FLUX
    "FluxTransformer2DModel": (
        Polynomial(coefficients=(4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)),
    ),
    # https://github.com/vllm-project/vllm-omni, for the whole family
    "QwenImageTransformer2DModel": (Polynomial(coefficients=(-4.5e02, 2.8e02, -4.5e01, 3.2, -2e-02)),),
    # https://github.com/ali-vilab/TeaCache, TeaCache4Wan2.1: text to video 1.3B and 14B, from the modulations
    "WanTransformer3DModel": (
        Polynomial(
            coefficients=(-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
            matching={"num_attention_heads": 12, "in_channels": 16},
        ),
        Polynomial(
            coefficients=(-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
            matching={"num_attention_heads": 40, "in_channels": 16},
        ),
    ),
}


def register_extractor(
    transformer_class_name: str, extractor: Extractor, *, coefficients: Sequence[float] | None = None
) -> None:
    """Let the step caches run a transformer. Registering a name again replaces it.

    ``extractor(transformer, *args, **kwargs)`` takes what the transformer's forward takes and returns it as a
    :class:`~vllm_omni.diffusion.staged_forward.StagedForward`. ``coefficients`` are TeaCache's polynomial, the
    highest degree first; ``tools/fit_teacache.py`` fits them.
    """
    EXTRACTOR_REGISTRY[transformer_class_name] = extractor
    POLYNOMIALS.pop(transformer_class_name, None)
    if coefficients is not None:
        POLYNOMIALS[transformer_class_name] = (Polynomial(coefficients=tuple(coefficients)),)


def published_coefficients(
    transformer_class_name: str, config: Mapping[str, Any], num_transformers: int
) -> tuple[float, ...] | None:
    """The coefficients that were fitted for a transformer, or None."""
    for polynomial in POLYNOMIALS.get(transformer_class_name, ()):
        if polynomial.fits(config, num_transformers):
            return polynomial.coefficients
    return None
