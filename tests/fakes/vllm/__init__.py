"""A small engine shaped like vLLM: what the hooks need of it, and nothing else."""
