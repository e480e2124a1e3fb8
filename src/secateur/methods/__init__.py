"""The methods: one file per published system, and the contract that they fill in.

A method is a frozen dataclass of options plus the words in which it differs from the engine. The registry is
lazy: a name resolves to a module the first time it is asked for.
"""

from secateur.healing.recovery.adapted import Adapted
from secateur.methods.base import Method, Refittable, check_for_decoders, check_reach, reach
from secateur.methods.caching import (
    BudgetMethod,
    CacheChannelMethod,
    CacheElementMethod,
    CacheMethod,
    EvictionMethod,
    RereadMethod,
    WrapperMethod,
)
from secateur.methods.channels import ChannelMethod
from secateur.methods.depth import LayerMethod, SublayerMethod
from secateur.methods.descriptor import Descriptor
from secateur.methods.during import (
    Blocks,
    DynamicMethod,
    GradualMethod,
    ScheduledMethod,
    StartingMethod,
    Trained,
    TrainingMethod,
)
from secateur.methods.masking import SearchMethod, WeightMethod
from secateur.methods.presets import Combination, Preset, settled
from secateur.methods.prompts import Prompt, Rope
from secateur.methods.registry import describe, get_method, list_methods, make_method, register
from secateur.methods.rounds import Contest, RoundsMethod, TicketMethod
from secateur.methods.units import (
    CoupledMethod,
    IterativeMethod,
    NeuronMethod,
    PolicyMethod,
    StructuredMethod,
    SupernetMethod,
    TrainedMethod,
    UnitMethod,
)
from secateur.methods.views import (
    Consumer,
    Coupled,
    FeatureMaps,
    Fitting,
    Gone,
    Noise,
    Observed,
    Part,
    Seen,
    Sublayer,
    Target,
    Trials,
    Whole,
)
from secateur.methods.width import HiddenMethod, RotationMethod, VocabularyMethod
from secateur.options import option

__all__ = [
    "Blocks",
    "Combination",
    "Preset",
    "settled",
    "BudgetMethod",
    "CacheChannelMethod",
    "CacheElementMethod",
    "CacheMethod",
    "Adapted",
    "ChannelMethod",
    "Consumer",
    "Contest",
    "Coupled",
    "CoupledMethod",
    "Descriptor",
    "DynamicMethod",
    "EvictionMethod",
    "FeatureMaps",
    "Fitting",
    "Gone",
    "GradualMethod",
    "HiddenMethod",
    "IterativeMethod",
    "LayerMethod",
    "Method",
    "NeuronMethod",
    "Noise",
    "Observed",
    "Part",
    "ScheduledMethod",
    "Prompt",
    "Refittable",
    "RereadMethod",
    "Rope",
    "RotationMethod",
    "RoundsMethod",
    "PolicyMethod",
    "SearchMethod",
    "Seen",
    "StartingMethod",
    "StructuredMethod",
    "Sublayer",
    "SublayerMethod",
    "SupernetMethod",
    "Target",
    "TicketMethod",
    "Trained",
    "TrainingMethod",
    "TrainedMethod",
    "Trials",
    "UnitMethod",
    "VocabularyMethod",
    "WeightMethod",
    "Whole",
    "WrapperMethod",
    "check_for_decoders",
    "check_reach",
    "describe",
    "get_method",
    "list_methods",
    "make_method",
    "option",
    "reach",
    "register",
]
