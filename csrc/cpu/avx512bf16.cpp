#if defined(__x86_64__)
#define ILORA_ISA avx512bf16
#define ILORA_BYTES 64
#define ILORA_PAIRS
#define ILORA_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "kernels.inl"
#endif
