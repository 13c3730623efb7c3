"""Cross-entropy for JAX: information measures, losses on logits and on hidden states, their derivatives."""

from importlib import metadata as _metadata

from jaxent.checking import GradientReport as GradientReport
from jaxent.checking import check_gradient as check_gradient
from jaxent.curvature import fisher_vector_product as fisher_vector_product
from jaxent.curvature import ggn_vector_product as ggn_vector_product
from jaxent.curvature import linear_fisher_vector_product as linear_fisher_vector_product
from jaxent.curvature import linear_ggn_vector_product as linear_ggn_vector_product
from jaxent.curvature import logit_hessian as logit_hessian
from jaxent.curvature import logit_hessian_product as logit_hessian_product
from jaxent.diagnose import Finding as Finding
from jaxent.diagnose import checked as checked
from jaxent.diagnose import diagnose as diagnose
from jaxent.gradient_norms import GradientNoise as GradientNoise
from jaxent.gradient_norms import GradientNorms as GradientNorms
from jaxent.gradient_norms import gradient_noise_scale as gradient_noise_scale
from jaxent.gradient_norms import linear_gradient_norms as linear_gradient_norms
from jaxent.gradients import softmax_cross_entropy_gradient as softmax_cross_entropy_gradient
from jaxent.information import conditional_entropy as conditional_entropy
from jaxent.information import cross_entropy as cross_entropy
from jaxent.information import cross_entropy_with_logits as cross_entropy_with_logits
from jaxent.information import empirical_distribution as empirical_distribution
from jaxent.information import entropy as entropy
from jaxent.information import entropy_with_logits as entropy_with_logits
from jaxent.information import jensen_shannon_divergence as jensen_shannon_divergence
from jaxent.information import joint_entropy as joint_entropy
from jaxent.information import kl_divergence as kl_divergence
from jaxent.information import kl_divergence_with_logits as kl_divergence_with_logits
from jaxent.information import mutual_information as mutual_information
from jaxent.information import perplexity as perplexity
from jaxent.information import renyi_divergence as renyi_divergence
from jaxent.information import renyi_entropy as renyi_entropy
from jaxent.information import self_information as self_information
from jaxent.information import self_information_with_logits as self_information_with_logits
from jaxent.information import tsallis_entropy as tsallis_entropy
from jaxent.linear import linear_kl_divergence as linear_kl_divergence
from jaxent.linear import linear_loss as linear_loss
from jaxent.linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from jaxent.linear import linear_token_statistics as linear_token_statistics
from jaxent.losses import TokenStatistics as TokenStatistics
from jaxent.losses import nll_loss as nll_loss
from jaxent.losses import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxent.losses import softmax_cross_entropy as softmax_cross_entropy
from jaxent.losses import token_statistics as token_statistics
from jaxent.planning import Plan as Plan
from jaxent.planning import plan as plan
from jaxent.risk import EmpiricalRisk as EmpiricalRisk
from jaxent.risk import WeightedSum as WeightedSum

__version__ = _metadata.version("jaxent")
