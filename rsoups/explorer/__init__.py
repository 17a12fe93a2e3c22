"""The Gradio app in which a person chooses λ."""
