// Appended to the reader's kernel: runs it on a few shapes and compares with dense attention.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

static float drawn() { return (float)rand() / RAND_MAX * 2.0f - 1.0f; }

static int compare(int num_tokens, int context_len, int head_dim, int block_size, float size) {
  int used = (context_len + block_size - 1) / block_size, num_blocks = 2 * used + 1;
  std::vector<int> table(used);
  for (int i = 0; i < used; i++) table[i] = (i * 2 + 1) % num_blocks;
  std::vector<float> q(num_tokens * head_dim), k(num_blocks * block_size * head_dim, NAN), v(k), out(q);
  for (auto& x : q) x = drawn() * size;
  for (int t = 0; t < context_len; t++)
    for (int d = 0; d < head_dim; d++) {
      int at = (table[t / block_size] * block_size + t % block_size) * head_dim + d;
      k[at] = drawn() * size, v[at] = drawn();
    }
  float *dq, *dk, *dv, *dout;
  int* dtable;
  if (cudaMalloc(&dq, q.size() * 4) != cudaSuccess) return 3;
  cudaMalloc(&dk, k.size() * 4), cudaMalloc(&dv, v.size() * 4), cudaMalloc(&dout, out.size() * 4);
  cudaMalloc(&dtable, used * 4);
  cudaMemcpy(dq, q.data(), q.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(dk, k.data(), k.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(dv, v.data(), v.size() * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(dtable, table.data(), used * 4, cudaMemcpyHostToDevice);
  cudaMemset(dout, 0, out.size() * 4);
  simple_paged_attention<<<num_tokens, 128, context_len * 4>>>(
      dout, dq, dk, dv, dtable, context_len, head_dim, block_size);
  cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error != cudaSuccess) {
    printf("the kernel did not run: %s\n", cudaGetErrorString(error));
    return 1;
  }
  cudaMemcpy(out.data(), dout, out.size() * 4, cudaMemcpyDeviceToHost);
  for (int n = 0; n < num_tokens; n++) {
    std::vector<double> score(context_len);
    double largest = -1e300, total = 0;
    for (int t = 0; t < context_len; t++) {
      double sum = 0;
      for (int d = 0; d < head_dim; d++)
        sum += (double)q[n * head_dim + d] *
               k[(table[t / block_size] * block_size + t % block_size) * head_dim + d];
      score[t] = sum / sqrt((double)head_dim);
      largest = fmax(largest, score[t]);
    }
    for (auto& s : score) s = exp(s - largest), total += s;
    for (int d = 0; d < head_dim; d++) {
      double sum = 0;
      for (int t = 0; t < context_len; t++)
        sum += score[t] / total * v[(table[t / block_size] * block_size + t % block_size) * head_dim + d];
      float got = out[n * head_dim + d];
      if (!(fabs(got - sum) < 1e-3)) {
        printf("%d tokens, context %d, blocks of %d, token %d, element %d: %g, and it should be %g\n",
               num_tokens, context_len, block_size, n, d, got, sum);
        return 1;
      }
    }
  }
  return 0;
}

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 3;
  int shapes[][4] = {{1, 4, 8, 4}, {2, 16, 32, 16}, {3, 37, 64, 16}, {2, 300, 64, 16}, {1, 1, 8, 4}};
  for (auto& s : shapes)
    if (int code = compare(s[0], s[1], s[2], s[3], 1.0f)) return code;
  if (int code = compare(2, 50, 64, 16, 12.0f)) {
    printf("(with large scores: is the largest taken off before exp?)\n");
    return code;
  }
  printf("ok\n");
  return 0;
}
