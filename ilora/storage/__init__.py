"""Adapters on disk, on the Hub, and from and to PEFT. Imported by name: `ilora.save_adapter` and its kin."""
