// Exercise 2: paged attention for one head, in CUDA C++.
//
// `vllm-trace learn check ex2-cuda` compiles it with nvcc, and runs it where there is a GPU.
// One thread block for each token: blockIdx.x is its row of q and out. There are 128 threads, and
// shared memory for context_len floats. Compare exercise 2 in torch.

__global__ void simple_paged_attention(
    float* out,              // [num_tokens, head_dim]
    const float* q,          // [num_tokens, head_dim]
    const float* k_cache,    // [num_blocks, block_size, head_dim]
    const float* v_cache,    // [num_blocks, block_size, head_dim]
    const int* block_table,  // [max_blocks]
    int context_len,
    int head_dim,
    int block_size) {
  extern __shared__ float scores[];  // [context_len]
#error "simple_paged_attention is not written yet: take this line out and write it"
  // 1. Scores of the tokens: token i lies in block_table[i / block_size], at place i % block_size.
  // 2. Softmax over `scores`; __syncthreads() before other threads' scores are read.
  // 3. Each thread sums some elements of the output over all tokens.
}
