"""Quality of quantized and cached video transformers, on one that is trained here."""
