"""GPUs by name, and how fast groups of processes exchange bytes.

The figures are the makers' data sheets: dense bfloat16 peak without sparsity, memory bandwidth, one direction of the
links between the GPUs of a node (NVLink). Between nodes one network port per GPU is taken. Every figure can be given by
the user instead.
"""

from dataclasses import dataclass

GB = 1e9
"""Bytes of a gigabyte, as in GPUs' names."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal GPUs; speeds are of one GPU."""

    peak_tflops: float
    """Dense bfloat16 peak, TFLOP/s."""
    memory_bandwidth: float
    """GB/s."""
    intra_bandwidth: float
    """GB/s in one direction to GPUs of the same node."""
    inter_bandwidth: float
    """GB/s in one direction to other nodes."""
    gpus_per_node: int
    share: float
    """Share of the peak that kernels reach while no one communicates, 0 to 1: an assumption, not a measurement."""

    @property
    def flops(self) -> float:
        """FLOP/s that are reckoned with."""
        return self.peak_tflops * 1e12 * self.share

    def ring_seconds(self, sent: float, size: int, stride: int) -> float:
        """Seconds of a ring collective (all-gather, reduce-scatter, all-reduce).

        Args:
            sent: bytes that each process sends.
            size: processes in the group.
            stride: distance between their ranks.

        Rings run over all the network ports of a node at once, so that a group with g members on a node has g ports.
        """
        if size == 1 or not sent:
            return 0.0
        here = self._members(size, stride)
        if here == size:
            return sent / (self.intra_bandwidth * GB)
        return sent / (min(self.intra_bandwidth, self.inter_bandwidth * here) * GB)

    def exchange_seconds(self, sent: float, size: int, stride: int) -> float:
        """Seconds of an all-to-all in which each process sends ``sent`` bytes, evenly to the ``size - 1`` others."""
        if size == 1 or not sent:
            return 0.0
        away = sent * (size - self._members(size, stride)) / (size - 1)
        return max((sent - away) / (self.intra_bandwidth * GB), away / (self.inter_bandwidth * GB))

    def _members(self, size: int, stride: int) -> int:
        """Members of a group on one node, at least one."""
        return max(1, min(size, self.gpus_per_node // stride))


GPUS: dict[str, dict[str, float]] = {
    "a100": dict(peak_tflops=312, memory_bandwidth=2039, intra_bandwidth=300, inter_bandwidth=25, memory=80),
    "h100": dict(peak_tflops=989, memory_bandwidth=3350, intra_bandwidth=450, inter_bandwidth=50, memory=80),
    "h200": dict(peak_tflops=989, memory_bandwidth=4800, intra_bandwidth=450, inter_bandwidth=50, memory=141),
    "b200": dict(peak_tflops=2250, memory_bandwidth=8000, intra_bandwidth=900, inter_bandwidth=50, memory=180),
}
"""Data-sheet figures by ``--gpu`` name (SXM boards): TFLOP/s, GB/s, GB."""
