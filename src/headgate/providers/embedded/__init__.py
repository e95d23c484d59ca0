"""The embedded llama.cpp engine: one supervised child process per model file, spoken to over a private socket."""
