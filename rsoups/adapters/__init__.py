"""Read and check LoRA adapters, their tensors, names and lineage."""
