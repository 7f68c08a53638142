#if defined(__x86_64__)
#define ILORA_ISA avx2
#define ILORA_BYTES 32
#define ILORA_TARGET __attribute__((target("avx2,fma")))
#include "kernels.inl"
#endif
