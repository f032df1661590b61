def page(e):
    import html

    return "<pre>" + html.escape(str(e)) + "</pre>"
