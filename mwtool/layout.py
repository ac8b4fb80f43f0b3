"""What a plugin imports to describe an architecture; `mwtool.architecture.layout` documents each name."""

from mwtool.architecture.layout import FFN as FFN
from mwtool.architecture.layout import Adapter as Adapter
from mwtool.architecture.layout import DecoderLayer as DecoderLayer
from mwtool.architecture.layout import Experts as Experts
from mwtool.architecture.layout import Index as Index
from mwtool.architecture.layout import UnsupportedModel as UnsupportedModel
from mwtool.architecture.layout import WeightSlice as WeightSlice
from mwtool.architecture.layout import fused_experts as fused_experts
from mwtool.architecture.layout import fused_mlp as fused_mlp
from mwtool.architecture.layout import gated_mlp as gated_mlp
from mwtool.architecture.layout import plain_mlp as plain_mlp
