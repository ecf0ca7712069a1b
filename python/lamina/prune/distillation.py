"""What the dense model knows, as a loss for the pruned one."""

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """How far a student's classes are from the teacher's, and from the right ones.

    "Distilling the Knowledge in a Neural Network" (Hinton, Vinyals & Dean 2015, arXiv:1503.02531):
    alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * cross entropy with the targets.

    Args:
        student: logits [..., classes], of the model that trains.
        teacher: logits of the same shape, of the dense model on the same inputs; no gradient flows into them.
        targets: [...] int64 classes; None leaves the second part out, whatever alpha is.
        temperature: above 1 it shows what the teacher holds possible besides its answer.
        alpha: the teacher's share, 0 to 1.
        label_smoothing: of the second part.

    Returns the mean over all rows, a scalar. Raises ValueError for shapes that differ and numbers out of range.

    >>> loss = lamina.prune.distillation_loss(model(x), dense(x), y, temperature=4.0, alpha=0.9)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: student is {list(student.shape)} and teacher {list(teacher.shape)}, but both must be "
            "logits of the same classes"
        )
    if not temperature > 0.0 or not 0.0 <= alpha <= 1.0:
        raise ValueError(
            f"distillation_loss: temperature is {temperature:g} and alpha {alpha:g}, but they must be above 0 and "
            "between 0 and 1"
        )
    soft = F.kl_div(
        F.log_softmax(student.flatten(0, -2) / temperature, -1),
        F.log_softmax(teacher.detach().flatten(0, -2) / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    soft = soft * temperature**2
    if targets is None:
        return soft
    hard = F.cross_entropy(student.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)
    return alpha * soft + (1.0 - alpha) * hard
