"""Pairs of runs: a checkpoint of the first, converted, must be what the second saves."""

from __future__ import annotations

from dataclasses import replace

from .spec import Model, Run

DENSE = Run()
ODD = Run(Model(hidden=40, ffn=88, tied=False), dp=2)
TIED_ODD = Run(Model(hidden=40, ffn=88), dp=3)
"""The shared embedding has a bucket of its own, whose place depended on DP in 0.12."""
MOE = Run(Model("moe", tied=False), ep=2, dp=2)
DEEPSEEK = Run(Model("deepseek", tied=False), ep=2, dp=2)
LATE_MOE = Run(Model("deepseek", tied=False, leading_dense=4), ep=2, dp=2)
"""The first stage has no experts, but gets some with virtual stages."""
BUCKETS = Run(Model(hidden=36, ffn=44, tied=False), dp=2, bucket_size=4000)
"""No weight fills 64-element blocks either, so that it shows where a bucket ends."""
GATHERED = Run(Model(layers=8), pp=4, layout="Et|t|t|tttttL")
MTP = Run(Model("deepseek", tied=False, mtp_layers=1), ep=2, dp=2)
MTP_ODD = Run(Model(hidden=40, ffn=88, mtp_layers=2), dp=2)
MTP_STAGES = Run(Model(layers=7, mtp_layers=1), pp=3, layout="Ett|ttt|ttmL")
ACCOUNTED = Run(Model(layers=10), account_for_embedding=True, account_for_loss=True)
UNEVEN = Run(Model(layers=10), pp=2, first_layers=4)


def virtual(run: Run, vpp: int = 2, layout: str | None = None) -> Run:
    """The run with virtual stages."""
    return replace(run, vpp=vpp, layout=layout)


CASES = {
    "dense tied": (DENSE, virtual(DENSE)),
    "dense untied, odd sizes, DP 2": (ODD, virtual(ODD)),
    "dense tied, odd sizes, DP 3": (TIED_ODD, virtual(TIED_ODD)),
    "dense, PP 4": (replace(DENSE, pp=4), virtual(replace(DENSE, pp=4))),
    "dense, TP 2": (replace(DENSE, tp=2), virtual(replace(DENSE, tp=2))),
    "dense, CP 2": (replace(ODD, dp=1, cp=2), virtual(replace(ODD, dp=1, cp=2))),
    "dense, uneven stages": (UNEVEN, virtual(UNEVEN)),
    "dense, embedding and loss count as layers": (ACCOUNTED, virtual(ACCOUNTED, 3)),
    "dense, buckets": (BUCKETS, virtual(BUCKETS)),
    "dense, number of buckets": (replace(ODD, num_buckets=9), virtual(replace(ODD, num_buckets=9))),
    "dense, gather with the step": (DENSE, replace(virtual(DENSE), overlap_step=True)),
    "MoE EP 2": (MOE, virtual(MOE)),
    "MoE EP 1": (replace(MOE, ep=1), virtual(replace(MOE, ep=1))),
    "MoE EP 2, layout": (MOE, virtual(MOE, layout="Ettt|tt|t|ttL")),
    "MoE TP 2 ETP 1 EP 2": (
        replace(MOE, dp=1, tp=2, etp=1),
        virtual(replace(MOE, dp=1, tp=2, etp=1)),
    ),
    "DeepSeek EP 2": (DEEPSEEK, virtual(DEEPSEEK)),
    "DeepSeek PP 4 EP 2": (replace(LATE_MOE, pp=4), virtual(replace(LATE_MOE, pp=4))),
    "DeepSeek, first stage without experts": (LATE_MOE, virtual(LATE_MOE)),
    "layout, an empty stage": (DENSE, virtual(DENSE, layout="Ettt||tt|tttL")),
    "layout, a chunk of three source stages": (
        GATHERED,
        virtual(GATHERED, layout="Ettt|t|t|t|t|t||L"),
    ),
    "layout to layout": (
        virtual(DENSE, layout="Ettt||tt|tttL"),
        virtual(DENSE, 3, layout="Et|tt|t|tt|tt|L"),
    ),
    "layout, the first stage had no layers": (
        Run(layout="E|ttttttttL"),
        virtual(DENSE, layout="Et|ttt|tttt|L"),
    ),
    "MTP EP 2": (MTP, virtual(MTP)),
    "MTP tied, odd sizes": (MTP_ODD, virtual(MTP_ODD)),
    "MTP, a stage of its own": (MTP_STAGES, virtual(MTP_STAGES, layout="Ett|tt|tt|t|m|L")),
    "back: dense": (virtual(ODD), ODD),
    "back: buckets": (virtual(BUCKETS), BUCKETS),
    "back: MoE": (virtual(MOE), MOE),
    "back: experts leave the first stage": (virtual(LATE_MOE), LATE_MOE),
    "back: MTP": (virtual(MTP), MTP),
    "back: layout": (virtual(GATHERED, layout="Ettt|t|t|t|t|t||L"), GATHERED),
    "VPP 2 to VPP 4": (virtual(MOE), virtual(MOE, 4)),
}
