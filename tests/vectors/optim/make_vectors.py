"""Makes optim.json: ten steps of torch.optim.Muon and torch.optim.AdamW on small matrices.

Run: python tests/vectors/optim/make_vectors.py > tests/vectors/optim/optim.json      (torch 2.11.0, CPU)

Muon stands here twice: as released (Newton-Schulz in bfloat16) and with the iteration in float32, which is what
Refinery runs on CPUs; nothing else is patched. Gradients are those of 0.5 |W - target|^2 plus seeded noise, stored so
that both sides see the same numbers.
"""

import json
import sys

import torch
from torch.optim import _muon

SHAPES = {"a": (3, 8), "b": (8, 3), "c": (5, 5), "d": (3, 8)}
STEPS = 10


def newton_schulz_float32(grad, ns_coefficients, ns_steps, eps):
    """The function of torch/optim/_muon.py with float32 in place of bfloat16."""
    a, b, c = ns_coefficients
    x = grad.float().clone()
    if grad.size(0) > grad.size(1):
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def run(make_optimizer, start, gradients):
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer(list(parameters.values()))
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    return {name: parameter.detach().flatten().tolist() for name, parameter in parameters.items()}


def main():
    torch.manual_seed(20)
    torch.set_num_threads(1)
    start = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    gradients = {name: [torch.randn(shape) for _ in range(STEPS)] for name, shape in SHAPES.items()}
    gradients["c"][3].zero_()
    cases = []
    released = _muon._zeropower_via_newtonschulz
    for scale in ("original", "match_rms_adamw"):
        for nesterov in (True, False):
            for iteration in ("float32", "bfloat16"):
                # Without Nesterov the release normalises the momentum buffer in place only when it is bfloat16; float32
                # parameters, as here, are not affected.
                _muon._zeropower_via_newtonschulz = newton_schulz_float32 if iteration == "float32" else released
                settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
                make = lambda p: torch.optim.Muon(p, nesterov=nesterov, adjust_lr_fn=scale, **settings)
                cases.append({"optimizer": "muon", "scale": scale, "nesterov": nesterov, "iteration": iteration,
                              **settings, "final": run(make, start, gradients)})
    for settings in ({"lr": 0.01, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
                     {"lr": 0.03, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-6}):
        cases.append({"optimizer": "adamw", **settings,
                      "final": run(lambda p: torch.optim.AdamW(p, **settings), start, gradients)})
    clip = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    for name, parameter in clip.items():
        parameter.grad = gradients[name][0].clone()
    norm = torch.nn.utils.clip_grad_norm_(list(clip.values()), 1.5)
    json.dump({"torch": torch.__version__, "shapes": SHAPES,
               "start": {n: v.flatten().tolist() for n, v in start.items()},
               "gradients": {n: [g.flatten().tolist() for g in gs] for n, gs in gradients.items()},
               "cases": cases,
               "clip": {"max_norm": 1.5, "norm": norm.item(),
                        "clipped": {n: p.grad.flatten().tolist() for n, p in clip.items()}}},
              sys.stdout)


main()
