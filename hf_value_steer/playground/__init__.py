"""The playground: a page in the browser on which steering can be tried. It alone imports gradio."""
