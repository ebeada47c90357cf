"""The Gemma family: shapes, presets, decoder, cache, and its Hugging Face and GGUF forms."""

from cabochon.models.gemma.cache import GemmaCache
from cabochon.models.gemma.config import GemmaConfig, parameter_counts
from cabochon.models.gemma.convert import read_gemma, write_gemma
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.gemma.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Gemma",
    "GemmaCache",
    "GemmaConfig",
    "parameter_counts",
    "preset",
    "read_gemma",
    "write_gemma",
]
