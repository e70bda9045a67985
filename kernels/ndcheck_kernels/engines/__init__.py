"""The kernels inside serving engines that other people run: vLLM's plug-in."""
