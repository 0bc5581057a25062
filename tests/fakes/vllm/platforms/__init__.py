"""The platform that vLLM decided on, as far as anybody asks."""


class CpuPlatform:
    def is_cpu(self):
        return True


current_platform = CpuPlatform()
