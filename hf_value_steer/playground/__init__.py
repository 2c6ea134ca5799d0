"""The playground: a page in the browser on which steering can be tried. Its page alone imports gradio."""
