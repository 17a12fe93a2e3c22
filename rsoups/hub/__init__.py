"""Publish folders on the Hugging Face Hub."""
