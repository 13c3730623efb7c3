"""Cross-entropy for JAX: information measures, losses on logits and on hidden states, their derivatives.

Data is positional, options are keywords; classes are on the last axis unless `axis` says otherwise; results are at
least float32. Losses and measures are pure functions that work under every JAX transformation.

Measures of distributions

    self_information                  -log p
    entropy                           the mean self-information, H(P)
    cross_entropy                     the mean self-information under Q, H(P, Q) = H(P) + D(P||Q)
    kl_divergence                     the extra cost of coding P with Q's code, D(P||Q)
    jensen_shannon_divergence         the mean divergence of two distributions from their mixture
    generalized_jensen_shannon_divergence  the same for any number of distributions
    renyi_entropy                     the family with Shannon's entropy at order 1
    renyi_divergence                  the family with the Kullback-Leibler divergence at order 1
    tsallis_entropy                   the family with the Gini impurity at order 2
    perplexity                        the number of equally likely classes with the same entropy, exp(H)
    total_variation_distance          the largest difference of the probabilities of an event
    hellinger_distance                the distance of the square roots of the probabilities
    brier_score                       the squared distance of forecasts from what came
    empirical_distribution            relative frequencies of labels, or of several labels together

Measures of several variables

    joint_entropy                     H(X, Y) of a table of joint probabilities
    conditional_entropy               H(X | Y) or H(Y | X)
    mutual_information                I(X; Y) = D(P_XY || P_X P_Y)
    conditional_mutual_information    I(X; Y | Z)
    pointwise_mutual_information      log p(x, y) / (p(x) p(y)) of each pair
    normalized_mutual_information     I(X; Y) as a share of the entropies
    variation_of_information          H(X | Y) + H(Y | X), a distance of partitions

The same from logits (log-probabilities are logits too)

    self_information_with_logits      -log_softmax
    entropy_with_logits               H(softmax(z))
    cross_entropy_with_logits         H(P, Q) of two softmaxes
    kl_divergence_with_logits         D(P||Q) of two softmaxes

Losses on logits

    softmax_cross_entropy             with labels or probabilities; every option of PyTorch's CrossEntropyLoss
    nll_loss                          with labels, from log-probabilities
    sigmoid_cross_entropy             binary, entry by entry
    token_statistics                  log-probability, log-normaliser, entropy, argmax, rank and top classes per row
    TokenStatistics                   what it returns
    SparseTargets                     a few classes per row with their probabilities, in place of labels
    softmax_cross_entropy_gradient    its derivative with respect to the logits, in closed form

Losses from hidden states (without the logits)

    linear_softmax_cross_entropy      softmax_cross_entropy of hidden @ kernel + bias in three matrix products
    linear_token_statistics           token_statistics of the same
    linear_kl_divergence              a divergence between two heads, for distillation
    linear_kl_divergence_from_top     the same from a teacher's stored top k classes
    linear_loss                       the engine for a row loss of your own
    linear_rows                       what a function of your own gives for each row
    plan                              memory and work of a call, estimated in advance
    Plan                              what it returns

Curvature

    logit_hessian                     diag(p) - p p^T
    logit_hessian_product             the same times a vector, without the matrix
    ggn_vector_product                Gauss-Newton (the true Fisher matrix) through any model
    fisher_vector_product             the empirical Fisher matrix through any model
    linear_ggn_vector_product         Gauss-Newton of a linear head, streamed
    linear_fisher_vector_product      the empirical Fisher matrix of a linear head, streamed
    linear_ggn_diagonal               the diagonal of Gauss-Newton of a linear head, streamed
    GGNDiagonal                       what it returns

Gradients per row

    linear_gradient_norms             norms of each row's or sequence's gradients: logits (EL2N), hidden, kernel, bias
    GradientNorms                     what it returns
    gradient_noise_scale              the batch size beyond which more examples stop paying off
    GradientNoise                     what it returns

Sums

    WeightedSum                       a total and its weight: means over parts that equal the mean of the whole
    EmpiricalRisk                     the same over 1e9 tokens without losing a digit

Checks

    diagnose                          suspicious inputs of a loss, on the host
    Finding                           one such suspicion
    checked                           a loss that reports them inside a compiled program, under checkify
    check_gradient                    whether a gradient is right, and to how many digits
    GradientReport                    what it returns
    Comparison                        one line of it: the worst entry of one way to the derivative
    ShardingWarning                   a call that moves more between devices than it has to

`jaxent.torch_compat` has PyTorch's losses under their own names, with its results;
`jaxent --help` describes the command line.
"""

from jaxent import _command as _command  # first: Ctrl-C while jax is imported
from jaxent._arguments.reduction import WeightedSum as WeightedSum
from jaxent._arguments.targets import SparseTargets as SparseTargets
from jaxent._check.gradient import Comparison as Comparison
from jaxent._check.gradient import GradientReport as GradientReport
from jaxent._check.gradient import check_gradient as check_gradient
from jaxent._check.inputs import Finding as Finding
from jaxent._check.inputs import checked as checked
from jaxent._check.inputs import diagnose as diagnose
from jaxent._errors import ShardingWarning as ShardingWarning
from jaxent._math.statistics import TokenStatistics as TokenStatistics
from jaxent.costs import Plan as Plan
from jaxent.costs import plan as plan
from jaxent.curvature import fisher_vector_product as fisher_vector_product
from jaxent.curvature import ggn_vector_product as ggn_vector_product
from jaxent.curvature import logit_hessian as logit_hessian
from jaxent.curvature import logit_hessian_product as logit_hessian_product
from jaxent.divergences import generalized_jensen_shannon_divergence as generalized_jensen_shannon_divergence
from jaxent.divergences import hellinger_distance as hellinger_distance
from jaxent.divergences import jensen_shannon_divergence as jensen_shannon_divergence
from jaxent.divergences import kl_divergence as kl_divergence
from jaxent.divergences import renyi_divergence as renyi_divergence
from jaxent.divergences import total_variation_distance as total_variation_distance
from jaxent.empirical import empirical_distribution as empirical_distribution
from jaxent.gradient_norms import GradientNoise as GradientNoise
from jaxent.gradient_norms import GradientNorms as GradientNorms
from jaxent.gradient_norms import gradient_noise_scale as gradient_noise_scale
from jaxent.gradient_norms import linear_gradient_norms as linear_gradient_norms
from jaxent.gradients import softmax_cross_entropy_gradient as softmax_cross_entropy_gradient
from jaxent.information import cross_entropy as cross_entropy
from jaxent.information import entropy as entropy
from jaxent.information import perplexity as perplexity
from jaxent.information import renyi_entropy as renyi_entropy
from jaxent.information import self_information as self_information
from jaxent.information import tsallis_entropy as tsallis_entropy
from jaxent.information_with_logits import cross_entropy_with_logits as cross_entropy_with_logits
from jaxent.information_with_logits import entropy_with_logits as entropy_with_logits
from jaxent.information_with_logits import kl_divergence_with_logits as kl_divergence_with_logits
from jaxent.information_with_logits import self_information_with_logits as self_information_with_logits
from jaxent.joint_information import conditional_entropy as conditional_entropy
from jaxent.joint_information import conditional_mutual_information as conditional_mutual_information
from jaxent.joint_information import joint_entropy as joint_entropy
from jaxent.joint_information import mutual_information as mutual_information
from jaxent.joint_information import normalized_mutual_information as normalized_mutual_information
from jaxent.joint_information import pointwise_mutual_information as pointwise_mutual_information
from jaxent.joint_information import variation_of_information as variation_of_information
from jaxent.linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from jaxent.linear_curvature import linear_fisher_vector_product as linear_fisher_vector_product
from jaxent.linear_curvature import linear_ggn_vector_product as linear_ggn_vector_product
from jaxent.linear_diagonal import GGNDiagonal as GGNDiagonal
from jaxent.linear_diagonal import linear_ggn_diagonal as linear_ggn_diagonal
from jaxent.linear_divergence import linear_kl_divergence as linear_kl_divergence
from jaxent.linear_divergence import linear_kl_divergence_from_top as linear_kl_divergence_from_top
from jaxent.linear_functions import linear_loss as linear_loss
from jaxent.linear_functions import linear_rows as linear_rows
from jaxent.losses import nll_loss as nll_loss
from jaxent.losses import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxent.losses import softmax_cross_entropy as softmax_cross_entropy
from jaxent.risk import EmpiricalRisk as EmpiricalRisk
from jaxent.scores import brier_score as brier_score
from jaxent.token_statistics import linear_token_statistics as linear_token_statistics
from jaxent.token_statistics import token_statistics as token_statistics

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "EmpiricalRisk",
    "Finding",
    "GGNDiagonal",
    "GradientNoise",
    "GradientNorms",
    "GradientReport",
    "Plan",
    "ShardingWarning",
    "SparseTargets",
    "TokenStatistics",
    "WeightedSum",
    "brier_score",
    "check_gradient",
    "checked",
    "conditional_entropy",
    "conditional_mutual_information",
    "cross_entropy",
    "cross_entropy_with_logits",
    "diagnose",
    "empirical_distribution",
    "entropy",
    "entropy_with_logits",
    "fisher_vector_product",
    "generalized_jensen_shannon_divergence",
    "ggn_vector_product",
    "gradient_noise_scale",
    "hellinger_distance",
    "jensen_shannon_divergence",
    "joint_entropy",
    "kl_divergence",
    "kl_divergence_with_logits",
    "linear_fisher_vector_product",
    "linear_ggn_diagonal",
    "linear_ggn_vector_product",
    "linear_gradient_norms",
    "linear_kl_divergence",
    "linear_kl_divergence_from_top",
    "linear_loss",
    "linear_rows",
    "linear_softmax_cross_entropy",
    "linear_token_statistics",
    "logit_hessian",
    "logit_hessian_product",
    "mutual_information",
    "nll_loss",
    "normalized_mutual_information",
    "perplexity",
    "plan",
    "pointwise_mutual_information",
    "renyi_divergence",
    "renyi_entropy",
    "self_information",
    "self_information_with_logits",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_gradient",
    "token_statistics",
    "total_variation_distance",
    "tsallis_entropy",
    "variation_of_information",
]


def __dir__() -> list[str]:
    """The public names and modules, and not the private folders that importing them has loaded."""
    return [name for name in globals() if name.startswith("__") or not name.startswith("_")]
