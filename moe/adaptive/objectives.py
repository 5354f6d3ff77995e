"""The three objectives of Jacobs, Jordan, Nowlan & Hinton 1991 (Neural Computation 3:79-87).

For the experts' outputs o_i, the gate p = softmax(logits) and the target d:

    cooperative              ‖d − Σ_i p_i o_i‖²                (eq. 1.1)  experts fit what the others leave
    competitive              Σ_i p_i ‖d − o_i‖²                (eq. 1.2)  each expert answers for the whole target
    negative log-likelihood  −log Σ_i p_i exp(−½‖d − o_i‖²)    (eq. 1.3)  the same, best expert first

Every function takes what the mixture returns and the targets, and is the mean over cases. By Jensen's inequality the
third is at most half the second and equal to it only where all distances of a case are equal.

T cases, E experts, O outputs.
"""

from torch import Tensor

from ...configs.typed import check


def blend(outputs_TEO: Tensor, logits_TE: Tensor) -> Tensor:
    """Σ_i p_i o_i with p = softmax(logits): [T, O]."""
    return (logits_TE.softmax(-1)[..., None] * outputs_TEO).sum(1)


def cooperative(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Tensor:
    """Mean over cases of ‖d − Σ_i p_i o_i‖² (eq. 1.1). Scalar.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    _check_shapes(outputs_TEO, logits_TE, targets_TO)
    return (targets_TO - blend(outputs_TEO, logits_TE)).square().sum(-1).mean()


def competitive(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Tensor:
    """Mean over cases of Σ_i p_i ‖d − o_i‖² (eq. 1.2). Scalar.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    _check_shapes(outputs_TEO, logits_TE, targets_TO)
    return (logits_TE.softmax(-1) * _distances(outputs_TEO, targets_TO)).sum(-1).mean()


def negative_log_likelihood(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Tensor:
    """Mean over cases of −log Σ_i p_i exp(−½‖d − o_i‖²) (eq. 1.3), without the Gaussian's constant. Scalar.

    Its gradient for one case is −posterior_i (d − o_i) at o_i and p_i − posterior_i at gate logit i. Computed by
    logsumexp: a target far from every expert gives a large loss and a finite gradient.

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    _check_shapes(outputs_TEO, logits_TE, targets_TO)
    return -_log_joint(outputs_TEO, logits_TE, targets_TO).logsumexp(-1).mean()


def posterior(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Tensor:
    """p_i exp(−½‖d − o_i‖²) / Σ_j p_j exp(−½‖d − o_j‖²), how much expert i answers for the case (eq. 1.5): [T, E].

    Raises:
        ConfigError: the shapes do not fit each other.
    """
    _check_shapes(outputs_TEO, logits_TE, targets_TO)
    return _log_joint(outputs_TEO, logits_TE, targets_TO).softmax(-1)


OBJECTIVES = {"cooperative": cooperative, "competitive": competitive, "log-likelihood": negative_log_likelihood}


def _distances(outputs_TEO: Tensor, targets_TO: Tensor) -> Tensor:
    return (targets_TO[:, None] - outputs_TEO).square().sum(-1)


def _log_joint(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> Tensor:
    return logits_TE.log_softmax(-1) - _distances(outputs_TEO, targets_TO) / 2


def _check_shapes(outputs_TEO: Tensor, logits_TE: Tensor, targets_TO: Tensor) -> None:
    """Broadcasting would hide a target of the wrong shape."""
    shapes = tuple(outputs_TEO.shape), tuple(logits_TE.shape), tuple(targets_TO.shape)
    fits = outputs_TEO.dim() == 3 and shapes[1:] == (shapes[0][:2], (shapes[0][0], shapes[0][2]))
    rule = "must be [T, E, O], [T, E] and [T, O]"
    check(fits, "outputs, logits, targets", shapes, rule, "give one row of logits and one target a case")
