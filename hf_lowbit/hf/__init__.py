"""How the package meets Hugging Face: registration, loading, saving. The only folder that imports those registries."""
