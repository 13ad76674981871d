"""``flexolmo plan --explain``: what every figure is made of, with the inputs of this plan."""

from flexolmo_megatron.launch.plan import Estimate, describe
from flexolmo_megatron.launch.plan_hardware import GB, Hardware
from flexolmo_megatron.launch.plan_state import State
from flexolmo_megatron.launch.plan_work import Work

UNMEASURED = """ What these
                modules save is taken from their source and was not measured, unlike that of the local ones."""
_TEMPLATE = """\
Explained for layout 1 ({layout}), on the pipeline process that needs the most memory (number {stage}).

MEMORY (counted; GB = 1e9 bytes)
  weights       {weights:.2f} GB: {trained:,} trained and {frozen:,} frozen parameters of this process, {element} bytes
                each. With the distributed optimizer trained ones lie in buffers, where parameters begin at multiples
                of 64 elements and a buffer ends at a multiple of lcm(128, data-parallel size).
  gradients     {gradients:.2f} GB: 4 bytes (fp32) per element of these buffers. Frozen parameters have none.
  optimizer     {optimizer:.2f} GB: {per_element} bytes per trained parameter ({parts}), divided by the {shards}
                processes that share it (experts: {expert_shards}). Frozen parameters have none.
  activations   {kept:.2f} GB kept for backward passes: of {flight}, counted tensor by tensor as
                {backend} modules save them; and {passing:.2f} GB for the largest temporary tensors. Experts
                are taken to get equal numbers of tokens.{unmeasured}
  limit         {limit:.1f} GB = GPU memory less --reserve (CUDA, NCCL, fragmentation, uneven routing).

TIME (estimated, not measured)
  compute       {compute:.2f} s = {flops:.3g} FLOP x {microbatches} microbatches / ({peak:g} TFLOP/s x share {share:g}).
                Matrix products only: 2 per weight and token forward, 2 for the input's gradient, 2 for the weight's
                (frozen: none), attention over half of the keys. The share is assumed the same in every layout, though
                thinner matrices (more TP, EP) run slower.
  bubble        {bubble:.2f} s = (PP - 1) / VPP x seconds of one microbatch on the slowest pipeline process.
  traffic       {traffic:.2f} s; bytes / bandwidth, without latency, nothing hidden behind computation.
                TP: each block gathers and scatters [tokens, hidden]. EP: top-k copies of each token, out and back,
                forward and backward. CP: keys and values to the others. PP: [tokens, hidden] / TP to the next.
                DP: reduce-scatter of fp32 gradients, all-gather of weights, once per step.
                Rings that leave a node use the ports of all their members on it: min({intra:g}, {inter:g} x members)
                GB/s; an all-to-all sends what stays in a node at {intra:g} and the rest at {inter:g} GB/s.
  optimizer     {adam:.3f} s: its state read and written at {memory:g} GB/s.
  step          {step:.2f} s = the sum. MFU {mfu:.1f} % = needed FLOP / (GPUs x peak x step).
  days          {days:.1f} = {tokens:.4g} B tokens / {per_step:,} tokens per step x step / 86,400 s.

Left out: data loading, checkpoints, validation, stragglers, failures. Measure a few steps before booking."""


def explain(work: Work, best: Estimate, hardware: Hardware, limit: float, tokens: float) -> str:
    """Return the formulas with the numbers of the best layout."""
    layout, worst = best.layout, best.worst
    held: State = worst.state
    flight = "1 microbatch" if layout.pipeline == 1 else "the microbatches in flight in the pipeline"
    return _TEMPLATE.format(
        layout=describe(layout),
        stage=worst.stage,
        weights=held.weights / GB,
        trained=held.trained,
        frozen=held.frozen,
        element=work.element,
        gradients=held.gradients / GB,
        optimizer=held.optimizer / GB,
        per_element=work.optimizer_bytes,
        parts="fp32 copy and two fp32 moments" if work.element == 2 else "two fp32 moments",
        shards=layout.shards if layout.distributed else 1,
        expert_shards=layout.expert_shards if layout.distributed else 1,
        kept=worst.activations.kept / GB,
        flight=flight,
        backend="Transformer Engine's" if work.backend == "te" else "the local",
        unmeasured=UNMEASURED if work.backend == "te" else "",
        passing=worst.activations.passing / GB,
        limit=limit / GB,
        compute=best.compute_seconds,
        flops=best.compute_seconds * hardware.flops / best.microbatches,
        microbatches=best.microbatches,
        peak=hardware.peak_tflops,
        share=hardware.share,
        bubble=best.bubble_seconds,
        traffic=sum(best.traffic_seconds.values()),
        intra=hardware.intra_bandwidth,
        inter=hardware.inter_bandwidth,
        adam=best.optimizer_seconds,
        memory=hardware.memory_bandwidth,
        step=best.seconds,
        mfu=100 * best.peak_share,
        days=best.days(tokens),
        tokens=tokens / 1e9,
        per_step=best.tokens,
    )
