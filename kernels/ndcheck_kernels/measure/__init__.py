"""How the kernels are measured: references, cases, bits and errors, times, compiled resources."""
