// 16-byte vectors: SSE2 on any x86-64, NEON on arm64.
#define ILORA_ISA baseline
#define ILORA_BYTES 16
#define ILORA_TARGET
#include "kernels.inl"
