// Exercise 2 in CUDA C++, solved.

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
  const float* query = q + blockIdx.x * head_dim;
  for (int i = threadIdx.x; i < context_len; i += blockDim.x) {
    const float* key =
        k_cache + (block_table[i / block_size] * block_size + i % block_size) * head_dim;
    float sum = 0.0f;
    for (int d = 0; d < head_dim; d++) sum += query[d] * key[d];
    scores[i] = sum * rsqrtf((float)head_dim);
  }
  __syncthreads();
  // Small and slow: every thread looks at all scores itself.
  float largest = scores[0], total = 0.0f;
  for (int i = 1; i < context_len; i++) largest = fmaxf(largest, scores[i]);
  for (int i = 0; i < context_len; i++) total += expf(scores[i] - largest);
  for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < context_len; i++) {
      const float* value =
          v_cache + (block_table[i / block_size] * block_size + i % block_size) * head_dim;
      sum += expf(scores[i] - largest) * value[d];
    }
    out[blockIdx.x * head_dim + d] = sum / total;
  }
}
