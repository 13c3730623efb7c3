"""Cross-entropy for JAX: information measures, losses on logits, their derivatives."""

from importlib.metadata import version

from jaxent.linear import linear_loss as linear_loss
from jaxent.linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from jaxent.linear import linear_token_statistics as linear_token_statistics
from jaxent.losses import TokenStatistics as TokenStatistics
from jaxent.losses import nll_loss as nll_loss
from jaxent.losses import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxent.losses import softmax_cross_entropy as softmax_cross_entropy
from jaxent.losses import token_statistics as token_statistics
from jaxent.risk import WeightedSum as WeightedSum

__version__ = version("jaxent")
