"""An engine small enough to read in an evening, equal to vLLM block for block.

Follows: vLLM's own names and releases; `rules` says where releases differ.
Leaves out: what each file says that it leaves out.

Read in this order: `block_pool` (blocks and the free queue), `request`, `kv_cache_manager` (who holds what),
`scheduler` (who computes what), `block_table` (what the kernels see), `rules`; then `attention` and `engine`.
`pages` is paged memory without vLLM, for a first look; `v0` is how the V0 engine did it, with swap and copy-on-write.

How long that is, in lines of code (half as many again are words about it): the engine 1,380, the two models that it
runs 150, attention in plain torch 500, the faces 250. The Triton kernels are not counted.

Nothing is imported here: attention and engine need torch, the rest does not.
"""
