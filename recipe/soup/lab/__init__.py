"""The second driver: the same rooms around one small model in one process, without Ray, FSDP and vLLM."""
