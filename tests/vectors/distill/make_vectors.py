"""Makes kd.json: the distillation loss and its gradient, computed by torch autograd in float64 over dense softmaxes.

Run: python tests/vectors/distill/make_vectors.py > tests/vectors/distill/kd.json      (torch 2.11.0, CPU)

Teacher and student are dense here: both are tempered whole, then the tokens outside the teacher's top K are summed into
one bucket, and the textbook KL is taken over K entries + rest.
"""

import json
import sys

import torch

N, H, V, K = 5, 6, 23, 7


def loss_of(hidden, head, teacher_logits, targets, temperature, kl_weight):
    top = teacher_logits.topk(K, dim=1).indices
    outside = torch.ones_like(teacher_logits).scatter(1, top, 0.0)
    p_t = (teacher_logits / temperature).softmax(1)
    q_t = (hidden @ head.T / temperature).softmax(1)

    def buckets(x):
        return torch.cat([x.gather(1, top), (x * outside).sum(1, keepdim=True)], 1)

    p_b, q_b = buckets(p_t), buckets(q_t)
    kl = (p_b * (p_b / q_b).log()).sum(1).mean()
    ce = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    return kl_weight * temperature**2 * kl + (1 - kl_weight) * ce, kl, ce


def main():
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    # Values that float32 holds exactly, so that both sides start from the same numbers.
    hidden = torch.randn(N, H).float().double().requires_grad_()
    head = torch.randn(V, H).float().double()
    teacher = (2 * torch.randn(N, V)).float().double()
    targets = torch.randint(0, V, (N,))
    cases = []
    for temperature, kl_weight in ((1.0, 1.0), (2.0, 1.0), (0.5, 0.75), (1.0, 0.25), (4.0, 0.5), (1.0, 0.0)):
        hidden.grad = None
        loss, kl, ce = loss_of(hidden, head, teacher, targets, temperature, kl_weight)
        loss.backward()
        cases.append({"temperature": temperature, "kl_weight": kl_weight, "loss": loss.item(), "kl": kl.item(),
                      "cross_entropy": ce.item(), "gradient": hidden.grad.flatten().tolist()})
    json.dump({"torch": torch.__version__, "n": N, "h": H, "v": V, "k": K, "hidden": hidden.detach().flatten().tolist(),
               "head": head.flatten().tolist(), "teacher": teacher.flatten().tolist(), "targets": targets.tolist(),
               "cases": cases}, sys.stdout)


main()
